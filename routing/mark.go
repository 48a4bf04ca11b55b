package routing

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// DefaultMark is the default of the mark of outer sockets. Kubernetes (0xc000),
// mwan3 (0x3f00), Tailscale (0xff0000) and wg-quick (0xca6c) do not use its
// bits.
const DefaultMark uint32 = 0xa0000000

// A mark is two bits of packet and connection marks. Other programs use the
// other bits, which are not changed. The higher bit keeps packets out of the
// tunnel. Packets of outer sockets have both bits. Packets of connections from
// outside the tunnel have the higher bit only.

// ValidMark reports whether mark can be a Config.Mark: it has exactly two bits.
func ValidMark(mark uint32) bool { return bits.OnesCount32(mark) == 2 }

// outsideMark returns the bit of mark that keeps packets out of the tunnel.
func outsideMark(mark uint32) uint32 { return mark &^ (mark & -mark) }

// MarkSocket returns a function for the Control field of net.ListenConfig and
// net.Dialer. It gives the socket the mark, so that its packets do not enter a
// tunnel with that Config.Mark. Its error matches os.ErrPermission if
// CAP_NET_ADMIN is missing. With mark 0 it does nothing.
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

// MarkSocketIfAllowed is MarkSocket without an error if this process lacks the
// privilege. It keeps packets out of a tunnel that is up, where they may reach
// nothing.
func MarkSocketIfAllowed(mark uint32) func(network, address string, c syscall.RawConn) error {
	set := MarkSocket(mark)
	return func(network, address string, c syscall.RawConn) error {
		err := set(network, address, c)
		if errors.Is(err, os.ErrPermission) {
			return nil
		}
		return err
	}
}
