package http3

import "sync/atomic"

// maxUnread is how many datagrams of one connection are kept for streams that
// nobody has received from yet. The peer sends them with its requests, for
// handlers that come a moment later, or for nobody: a stream takes thousands,
// and a peer has many.
const maxUnread = 64

// unread counts them.
type unread struct {
	n *atomic.Int32 // the connection's count
	// somebody has received from this stream; guarded by stateTrackingStream.mx
	reading bool
}

// keep reports whether one more datagram may be kept.
func (u *unread) keep() bool {
	if u.reading || u.n.Add(1) <= maxUnread {
		return true
	}
	u.n.Add(-1)
	return false
}

// read notes that somebody receives from the stream, or nobody ever will, while
// it has queued datagrams.
func (u *unread) read(queued int) {
	if !u.reading {
		u.reading = true
		u.n.Add(-int32(queued))
	}
}
