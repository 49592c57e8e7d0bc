"""Token models under one interface: hidden, state = model(tokens, state)."""
