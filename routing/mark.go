package routing

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// DefaultMark is the mark for outer sockets where nothing speaks for another.
const DefaultMark uint32 = 9484

// inboundMark is the mark of connections that came in from outside the tunnel,
// where mark is that of our own sockets. Both stay out of the tunnel.
func inboundMark(mark uint32) uint32 { return mark | 1 }

// MarkSocket returns a function for the Control field of net.ListenConfig and
// net.Dialer that gives a socket the mark, so that its packets stay out of every
// tunnel opened with that mark. It needs CAP_NET_ADMIN; without, the error is
// os.ErrPermission. With mark 0 it leaves the socket alone.
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
