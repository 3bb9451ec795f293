"""Reads the audit trail: what became of every stream's parameters, when, by how much, and why."""
