"""The contract that exporter, agents and firmware share: fleets, plans, manifests, messages, scores."""
