"""``align eval policy``: an LLM judge scores the answers of a policy."""
