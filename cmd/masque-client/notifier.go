package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/internal/daemon"
	"masquevpn/internal/fault"
)

// event is a message of a tunnel in the background to the `up` that started it,
// a JSON value on a pipe.
type event struct {
	Event  string       `json:"event"`
	State  string       `json:"state,omitempty"`
	Code   fault.Kind   `json:"code,omitempty"`
	Reason string       `json:"reason,omitempty"`
	Error  *fault.Error `json:"error,omitempty"`
}

// The events.
const (
	eventStarted = "started" // the process runs and has not failed

	// eventState has a new State and Reason, and the Code of the last failure
	// to connect.
	eventState = "state"

	eventFailed = "failed" // the process ends with Error
)

// notifier reports the start of a tunnel to `up`. A nil notifier reports to
// nobody.
type notifier struct {
	pipe *os.File
}

func openNotifier(fd int) (*notifier, error) {
	if fd < 0 {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, fault.Errorf(fault.Usage,
			"--notify-fd %d is not a pipe: leave the flag to `up`", fd)
	}
	unix.CloseOnExec(fd)
	return &notifier{pipe: os.NewFile(uintptr(fd), "notify")}, nil
}

// log returns the writer for the log.
func (n *notifier) log() io.Writer {
	if n == nil {
		return os.Stderr
	}
	return daemon.LogFile(os.Stderr)
}

// locked empties the log of the previous run. The caller holds the lock of the
// tunnel: no other process writes to the log any more.
func (n *notifier) locked() {
	if n != nil {
		_ = os.Stderr.Truncate(0) // a log that remains is harmless
	}
}

func (n *notifier) send(e event) {
	if n != nil {
		_ = json.NewEncoder(n.pipe).Encode(e) // `up` may be gone
	}
}

func (n *notifier) failed(e *fault.Error) {
	n.send(event{Event: eventFailed, Error: e})
}

// follow reports the changes of the tunnel's state until ctx is done or the
// tunnel has ended.
func (n *notifier) follow(ctx context.Context, t *tunnel) {
	if n == nil {
		<-ctx.Done()
		return
	}
	grace := time.NewTimer(startGrace)
	defer grace.Stop()
	started := false
	for {
		changed := t.client.Changed()
		s := t.client.Status()
		if s.Interface != "" && !started {
			started = true
			n.send(event{Event: eventStarted})
		}
		e := event{Event: eventState, State: s.State, Reason: s.Reason}
		if failure := t.client.Failure(); failure != nil {
			e.Code = failure.Kind
		}
		n.send(e)
		select {
		case <-changed:
		case <-grace.C:
			if !started {
				started = true
				n.send(event{Event: eventStarted})
			}
		case <-t.done:
			return
		case <-ctx.Done():
			return
		}
	}
}
