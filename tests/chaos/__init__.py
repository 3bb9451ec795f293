"""Fault injection: workers, broker and store under random faults, compared with an uninterrupted run."""
