"""The audit trail: how every stream's parameters changed, when, by how much, and why."""
