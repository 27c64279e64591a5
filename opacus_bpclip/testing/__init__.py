"""`check_rule`: everything that a rule must keep, tried on a layer of yours.

For authors of rules, in a test of their own; every rule of the package goes through it as well.
"""

from opacus_bpclip.testing.suite import check_rule

__all__ = ["check_rule"]
