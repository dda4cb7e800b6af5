"""Edgent (Li et al. 2020): exits of one branchy network times places to cut it in two."""
