"""Layer-wise model parallelism (Stahl et al. 2019): every layer spread over all devices."""
