"""LCP (Hadidi et al.): a network's width split into independent branches, merged once."""
