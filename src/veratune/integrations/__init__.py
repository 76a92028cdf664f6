"""Bridges to other libraries, one file each, imported only by those who use them."""
