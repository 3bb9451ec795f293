"""Measurements of more than one worker: throughput, and what a rebalance, a crash and a restart cost."""
