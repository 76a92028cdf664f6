"""Thousands of adapters of one base model at once, each row of a batch with its own."""

from veratune.bank.bank import AdapterBank, AdapterInfo
from veratune.bank.layout import BankError
from veratune.bank.model import BankModel

__all__ = ["AdapterBank", "AdapterInfo", "BankError", "BankModel"]
