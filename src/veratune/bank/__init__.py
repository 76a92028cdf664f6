"""Serve thousands of adapters of one base model at once, a different one for each sequence in a batch."""

from veratune.bank.bank import AdapterBank
from veratune.bank.layout import BankError
from veratune.bank.model import BankModel
from veratune.bank.registry import AdapterInfo

__all__ = ["AdapterBank", "AdapterInfo", "BankError", "BankModel"]
