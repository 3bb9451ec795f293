"""What is particular to Kafka and its client: the connection, and ways around what kafka-python does."""
