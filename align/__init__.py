"""align: RLHF policy alignment with the HelpSteer reward models."""

__version__ = "0.1.0"
