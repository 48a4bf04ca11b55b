package client

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"net"
	"testing"

	"github.com/quic-go/quic-go/quicvarint"
)

// answer returns a packet that anybody on the path can forge from the
// connection IDs of the client's first packet: original, the Destination
// Connection ID, and own, the Source Connection ID.
type answer func(original, own []byte) []byte

// forging returns a function that starts forge with a on a free port.
func forging(a answer) func(*testing.T) *testProxy {
	return func(t *testing.T) *testProxy { return forge(t, "127.0.0.1:0", a) }
}

// forge answers each Initial packet to address with the packet of a.
func forge(t *testing.T, address string, a answer) *testProxy {
	t.Helper()
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, from, err := socket.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 1200 || b[0]&0xf0 != 0xc0 { // other than an Initial packet
				continue
			}
			original, rest := b[6:6+b[5]], b[6+b[5]:n]
			_, _ = socket.WriteTo(a(original, rest[1:1+rest[0]]), from)
		}
	}()
	t.Cleanup(func() {
		_ = socket.Close()
		<-done
	})
	return &testProxy{addr: socket.LocalAddr().String()}
}

// noVersion returns a Version Negotiation packet without a version that the
// client supports (RFC 9000 section 17.2.1).
func noVersion(original, own []byte) []byte {
	b := append(longHeader(0x80, 0, own, original), 0x1a, 0x2a, 0x3a, 0x4a)
	return b
}

// closing returns an answer with an Initial packet that closes the connection
// with an error code (RFC 9000 sections 17.2.2 and 19.19). Its keys are derived
// from the client's Destination Connection ID (RFC 9001 section 5.2).
func closing(code uint64) answer {
	return func(original, own []byte) []byte {
		initial, err := hkdf.Extract(sha256.New, original,
			[]byte("\x38\x76\x2c\xf7\xf5\x59\x34\xb3\x4d\x17\x9a\xe6\xa4\xc8\x0c\xad\xcc\xbb\x7f\x0a"))
		must(err)
		secret := expand(initial, "server in", 32)
		block, err := aes.NewCipher(expand(secret, "quic key", 16))
		must(err)
		seal, err := cipher.NewGCM(block)
		must(err)
		mask, err := aes.NewCipher(expand(secret, "quic hp", 16))
		must(err)

		// CONNECTION_CLOSE with frame type 0 and without a reason phrase.
		payload := append(quicvarint.Append([]byte{0x1c}, code), 0, 0)
		payload = append(payload, make([]byte, 32)...)
		b := longHeader(0xc0, 1, own, original[:4])
		b = quicvarint.Append(b, 0) // no token
		b = quicvarint.Append(b, uint64(1+len(payload)+seal.Overhead()))
		b = append(b, 0) // packet number
		at := len(b) - 1
		b = seal.Seal(b, expand(secret, "quic iv", 12), payload, b)
		var m [16]byte
		mask.Encrypt(m[:], b[at+4:at+20])
		b[0] ^= m[0] & 0x0f
		b[at] ^= m[1]
		return b
	}
}

func longHeader(first byte, version uint32, to, from []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{first}, version)
	b = append(append(b, byte(len(to))), to...)
	return append(append(b, byte(len(from))), from...)
}

// expand is HKDF-Expand-Label of TLS 1.3 (RFC 8446 section 7.1).
func expand(secret []byte, label string, length int) []byte {
	label = "tls13 " + label
	info := append(append([]byte{0, byte(length), byte(len(label))}, label...), 0)
	out, err := hkdf.Expand(sha256.New, secret, string(info), length)
	must(err)
	return out
}
