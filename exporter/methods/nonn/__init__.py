"""NoNN (Bhardwaj et al. 2019): students that each learn a part of a teacher's knowledge."""
