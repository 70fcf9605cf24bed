"""VAS on Ray: align a frozen language model at decoding time (arXiv:2405.06639).

Importing this package is cheap: torch and ray load with the modules that use them.
"""

__version__ = "0.1.0"
