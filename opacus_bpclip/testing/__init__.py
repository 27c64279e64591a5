"""`check_rule`: a test suite for authors of rules; the package's own rules pass it, too."""

from opacus_bpclip.testing.suite import check_rule

__all__ = ["check_rule"]
