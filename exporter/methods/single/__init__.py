"""One device runs the whole network: what every split is compared with."""
