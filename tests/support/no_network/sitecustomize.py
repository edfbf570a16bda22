# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses every connection and name look-up of this process that could leave the machine.

`tests/conftest.py` imports it, and puts its folder into PYTHONPATH: Python imports a module of this name when it
starts, so all Python processes that a test starts have the guard too, however deep (`accelerate launch`, `torchrun`).
What is refused fails with ConnectionRefusedError, as without a network. Libraries may carry on after that, so it is
also written to the file that FLOWBP_TEST_REFUSED names, and `conftest.py` fails the test.

Allowed are Unix sockets, loopback addresses, and look-ups of this machine's own name. An audit hook sees all of
Python's sockets and cannot be taken off again. It does not see sockets that compiled code opens by itself (gloo's and
NCCL's between processes, hf_xet's, which tests do not use), nor programs that are not Python.
"""

import importlib.machinery
import importlib.util
import logging
import os
import sys
from typing import Any

# At its import, which is peft's too, bitsandbytes tells CPUs with AVX-512 of a package from the Hub that would make
# its 4-bit layers faster. Tests read what the scripts print.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _is_local(host: Any) -> bool:
    import ipaddress
    import socket

    host = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else host
    # None and "" are what a server binds to.
    if host in (None, "", "localhost", "localhost.localdomain", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if address.version == 6 else None
    return (mapped or address).is_loopback


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: it is called for every audited event of the interpreter, so the common case comes first."""
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        import socket

        connection, address = arguments
        # A connected socket sends without an address.
        if connection.family == socket.AF_UNIX or address is None or _is_local(address[0]):
            return
        refused = f"{address[0]} port {address[1]}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        if _is_local(arguments[0]):
            return
        refused = f"{arguments[0]} (look-up)"
    else:
        return
    message = (
        f"no network in tests: {os.path.basename(sys.argv[0])} tried to reach {refused}, only loopback is allowed"
    )
    if "FLOWBP_TEST_REFUSED" in os.environ:
        with open(os.environ["FLOWBP_TEST_REFUSED"], "a", encoding="utf-8") as file:
            file.write(message + "\n")
    raise ConnectionRefusedError(message)


def _run_the_next() -> None:
    """This module hides one of the same name that the system or the environment has; run that too."""
    here = os.path.dirname(os.path.realpath(__file__))
    others = [path for path in sys.path if os.path.realpath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.addaudithook(_guard)
if __name__ == "sitecustomize":
    _run_the_next()
    if "FLOWBP_TEST_WARM" in os.environ:
        import warm_python

        try:
            warm_python.stand_in()
        except BaseException as error:  # Python would go on, and run the program once more
            os.write(2, f"the stand-in failed: {error!r}\n".encode())
            os._exit(1)
