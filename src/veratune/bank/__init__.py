"""Thousands of adapters of one base model at once, each row of a batch with its own."""

from veratune.bank.bank import AdapterBank
from veratune.bank.layout import BankError
from veratune.bank.model import BankModel
from veratune.bank.registry import AdapterInfo

__all__ = ["AdapterBank", "AdapterInfo", "BankError", "BankModel"]
