package http3

import "sync/atomic"

// maxUnread limits the datagrams of one connection that are queued for streams
// before their first Receive. Each stream queues thousands of datagrams, and a
// peer can open many streams.
const maxUnread = 64

// unread counts the datagrams of a stream before its first Receive.
type unread struct {
	n *atomic.Int32 // count of all streams of the connection

	// reading is true after the first Receive. stateTrackingStream.mx guards
	// it.
	reading bool
}

// keep reports whether to queue another datagram.
func (u *unread) keep() bool {
	if u.reading || u.n.Add(1) <= maxUnread {
		return true
	}
	u.n.Add(-1)
	return false
}

// read records the first Receive, or the end of the stream, when queued
// datagrams are in its queue.
func (u *unread) read(queued int) {
	if !u.reading {
		u.reading = true
		u.n.Add(-int32(queued))
	}
}
