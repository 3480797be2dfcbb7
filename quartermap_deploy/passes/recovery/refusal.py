"""Why a scan is not recovered."""

from __future__ import annotations


class Refused(Exception):
    """A scan, or a way to read it, that is not of the form that recovery knows; the message says why.

    It never leaves the pass: the scan keeps its operator, and the report holds the message.
    """
