"""Models: loading, heads, attention without padding, and writing."""

from transformers.utils import logging

logging.set_verbosity_error()  # `load` refuses missing weights itself
logging.disable_progress_bar()  # log files and our own display have no use for them
