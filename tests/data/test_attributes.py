"""Names of attributes and their order."""

import pytest

from align import data
from align.data.attributes import HELPSTEER_ATTRIBUTES, NEMO_ATTRIBUTES, resolve_attributes
from align.errors import ConfigError


def test_the_order_of_nemo():
    assert NEMO_ATTRIBUTES.index("helpfulness") == 4  # the output that its preference training reads
    assert NEMO_ATTRIBUTES[0] == "quality" and NEMO_ATTRIBUTES[4:] == HELPSTEER_ATTRIBUTES
    assert (data.NEMO_ATTRIBUTES, data.HELPSTEER_ATTRIBUTES) == (NEMO_ATTRIBUTES, HELPSTEER_ATTRIBUTES)


def test_nemo_stands_for_nine():
    assert resolve_attributes(["nemo"]) == NEMO_ATTRIBUTES
    assert resolve_attributes(["verbosity", "helpfulness"]) == ("verbosity", "helpfulness")


def test_a_name_twice():
    with pytest.raises(ConfigError, match="attributes lists b, a more than once"):
        resolve_attributes(["b", "a", "a", "b", "c"])
