"""What is specific to kafka-python, and no other folder of the worker knows of its insides.

    client.py   opens every client, with all of the patches below in place
    inside.py   reads what a client knows and does not tell
    send.py     a shorter way into the producer, for speed
    join.py, fenced.py, nodes.py, sockets.py, reading.py                patches for flaws of clients and connections
    batches.py, records.py, unpack.py                                   patches for what senders may put into a topic
    topic.py    reads a topic from its beginning, or from a time on

Every patch was written for kafka-python 3.0.12. tests/worker/kafka/test_private_names.py lists all of its private names
that are used here and fails on another version: go through the list, then note the new version there.
"""
