"""Watching a fleet: messages become events, events become a state, a view shows the state."""
