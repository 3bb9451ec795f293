"""The streaming worker and the command line. The way of a frame through the worker:

    consume/, polling.py      records from Kafka; from where each partition is read, and what may be committed
    intake.py, decode/        validation, and decoding in threads
    batch/                    frames wait until their stream's micro-batch is due
    flights.py, step.py       when passes begin; the order of a step, on which docs/guarantees.md rests
    engine/, guard/           one pass for the micro-batches of many streams; what is accepted of its updates
    publish/                  predictions, update events and dead letters
    streams/, store/          loading and writing of streams' states
    control/                  commands to streams

run.py has the loop that turns all of this, and parts.py constructs it. One thread, that of the loop, owns all state.
The other threads get what they need handed over: passes (step.py), decoding, dead letters, the commands topic,
reach.py, and one of kafka-python for each client, which calls consume/group.py in a rebalance.

A part that waits for broker or store has the loop poll meanwhile, or the group would take the worker for dead. In that
poll partitions may be taken away. partitions.py then drops all that is in memory of them, so that whoever has waited
must look again what is still there: `Engine.holds` tells.
"""
