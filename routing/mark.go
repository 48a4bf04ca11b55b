package routing

import (
	"fmt"
	"math/bits"
	"syscall"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// DefaultMark is the mark for outer sockets where nothing speaks for another:
// bits that Kubernetes (0xc000), mwan3 (0x3f00), Tailscale (0xff0000) and
// wg-quick (0xca6c) leave alone.
const DefaultMark uint32 = 0xa0000000

// A mark is two bits of packet and connection marks. The others belong to other
// programs and are left as they are. Packets of our own sockets have both;
// those of connections that came in from outside the tunnel have the higher one
// only, so it is the one that keeps packets out of the tunnel.

// ValidMark says whether mark can be a Config.Mark: two bits.
func ValidMark(mark uint32) bool { return bits.OnesCount32(mark) == 2 }

// outsideMark is the bit of mark that keeps packets out of the tunnel.
func outsideMark(mark uint32) uint32 { return mark &^ (mark & -mark) }

// marked matches packets, or connections, of which the bits of mask are value.
func marked(load expr.Any, mask, value uint32) []expr.Any {
	return []expr.Any{
		load,
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
	}
}

// setBits makes the bits of mask value, and leaves the others as they are.
func setBits(load, store expr.Any, mask, value uint32) []expr.Any {
	return []expr.Any{
		load,
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^mask),
			Xor:  binaryutil.NativeEndian.PutUint32(value),
		},
		store,
	}
}

func packetMarked(mask, value uint32) []expr.Any {
	return marked(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, mask, value)
}

func connectionMarked(mask, value uint32) []expr.Any {
	return marked(&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, mask, value)
}

func markPacket(mask, value uint32) []expr.Any {
	return setBits(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true}, mask, value)
}

func markConnection(mask, value uint32) []expr.Any {
	return setBits(&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}, mask, value)
}

// MarkSocket returns a function for the Control field of net.ListenConfig and
// net.Dialer that gives a socket the mark, so that its packets stay out of
// every tunnel opened with that mark. It needs CAP_NET_ADMIN; without, the
// error is os.ErrPermission. With mark 0 it leaves the socket alone.
func MarkSocket(mark uint32) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		if mark == 0 {
			return nil
		}
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		}); cerr != nil {
			return cerr
		}
		if err != nil {
			return fmt.Errorf("routing: set mark %#x on the outer socket: %w", mark, explain(err))
		}
		return nil
	}
}
