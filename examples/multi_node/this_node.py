"""How this machine is seen by the others: ``this_node.py FIRST_HOST [ADDRESS]`` prints ``ADDRESS INTERFACE IS_FIRST``.

torchrun and gloo ask the machine's host name instead, which often leads to 127.0.0.1 (Debian's ``/etc/hosts``) or to
an interface that the other machines cannot reach. IPv4 only.
"""

import fcntl
import ipaddress
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915


def main(first_host: str, address: str | None = None) -> str:
    """The line to print; ``address`` is this machine's, found out if None. Exits with a message on a user's fault."""
    try:
        first = socket.gethostbyname(first_host)
    except OSError as error:
        sys.exit(f"--first {first_host}: {error.strerror}\n  give the first machine's name or address.")
    if address is None:
        address = address_towards(first)
        if is_loopback(first):
            sys.exit(
                f"--first {first_host} is {first} here, which on each machine is the machine itself\n"
                "  give the address at which the others reach the first machine."
            )
    elif not is_mine(address):
        sys.exit(f"--address {address} is not an address of this machine")
    return f"{address} {interface_of(address)} {int(address == first)}"


def address_towards(host: str) -> str:
    """This machine's address on its route to ``host``; ``host`` itself, on the machine whose address it is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # looks the route up; nothing is sent
        except OSError as error:
            sys.exit(f"no route to the first machine {host}: {error.strerror}")
        return str(probe.getsockname()[0])


def is_mine(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str:
    """The name of the interface with this address; ``-`` if it is not the first address of any interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # it has none
            if found == address or (is_loopback(found) and is_loopback(address)):
                return name
    return "-"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
