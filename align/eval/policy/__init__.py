"""``align eval policy``: what a policy answers, judged by a language model."""
