"""Faults planted into the real suite; see planted.py."""
