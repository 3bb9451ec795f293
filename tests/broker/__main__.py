"""`python -m tests.broker --port 9092 --data DIR`: a broker on loopback until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
from pathlib import Path

from tests.broker.data import Data
from tests.broker.requests import Broker
from tests.broker.server import Server

parser = argparse.ArgumentParser(prog="python -m tests.broker")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--advertised", type=int, help="the port that clients are told to come to, where it is another")
parser.add_argument("--data", type=Path, help="where everything is kept over a restart; without it, in memory only")
parser.add_argument("--user", action="append", default=[], metavar="NAME:PASSWORD", help="ask who clients are")
parser.add_argument("--certificate", type=Path, help="speak TLS: a PEM file with certificate and key")
parser.add_argument("--reading", type=int, default=0, metavar="MS", help="how long a fetch must be ready to wait")
arguments = parser.parse_args()


async def main() -> None:
    tls = None
    if arguments.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments.certificate)
    broker = Broker(Data(arguments.data), "127.0.0.1", arguments.advertised or arguments.port, arguments.reading)
    users = dict(user.split(":", 1) for user in arguments.user)
    await Server(broker, users).serve(arguments.port, tls)


logging.basicConfig(format="%(asctime)s %(message)s")
asyncio.run(main())
