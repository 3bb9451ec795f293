"""A small broker for tests: one node of the documented Kafka protocol, with its data in a folder.

It exists because no package brings a broker whose group coordinator holds to the protocol; docs/guarantees.md says
what it proves and what only a real Kafka can. Left out: transactions, replication, retention, compaction, quotas,
permissions, and topics that create themselves.
"""
