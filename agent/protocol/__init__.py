"""The contract of exporter, agents and firmware: fleet, plan, manifest, messages, scores."""
