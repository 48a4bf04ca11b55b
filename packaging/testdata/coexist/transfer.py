"""A long TCP transfer.

transfer.py serve ADDRESS PORT         accepts one connection and returns the SHA-256 of the received data
transfer.py send ADDRESS PORT SECONDS  sends for SECONDS; prints the bytes, the digest sent and the digest received
"""
import hashlib, random, socket, sys, time

CHUNK, INTERVAL, PATIENCE = 1 << 16, 0.1, 120

def serve(address, port):
    with socket.create_server((address, port)) as listener:
        connection, _ = listener.accept()
        with connection:
            digest = hashlib.sha256()
            while data := connection.recv(CHUNK):
                digest.update(data)
            connection.sendall(digest.hexdigest().encode())

def send(address, port, seconds):
    source, digest, total = random.Random(7), hashlib.sha256(), 0
    with socket.create_connection((address, port), timeout=PATIENCE) as connection:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = source.randbytes(CHUNK)
            connection.sendall(data)
            digest.update(data)
            total += CHUNK
            time.sleep(INTERVAL)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(CHUNK):
            received += data
    print(total, digest.hexdigest(), received.decode())

if sys.argv[1] == "serve":
    serve(sys.argv[2], int(sys.argv[3]))
else:
    send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
