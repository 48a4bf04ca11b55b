"""scatter.py SECONDS ADDRESS...: sends UDP packets to all addresses in turn, from unbound sockets."""
import socket, sys, time

end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for address in sys.argv[2:]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as s:
                s.sendto(b"leak?", (address, 9))
        except OSError:
            pass  # no route
    time.sleep(0.02)
