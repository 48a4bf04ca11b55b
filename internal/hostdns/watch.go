package hostdns

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/time/rate"
)

const (
	// settleDelay is what a program that writes a file has to finish.
	settleDelay = 100 * time.Millisecond
	// putBackEvery and putBackBurst are how often the work of another program
	// is undone.
	putBackEvery = 10 * time.Second
	putBackBurst = 5
)

// watcher calls a function when a file changes.
type watcher struct {
	w    *fsnotify.Watcher
	done sync.WaitGroup
	stop chan struct{}
}

// watch calls check after changes of the file at path, which may be replaced,
// and at the start, until it is closed. Where check says that it had to act, it
// is called at a rate.
func watch(path string, check func() bool) (*watcher, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := w.Add(filepath.Dir(path)); err != nil {
		w.Close()
		return nil, err
	}
	x := &watcher{w: w, stop: make(chan struct{})}
	x.done.Go(func() { x.run(path, check) })
	return x, nil
}

func (x *watcher) run(path string, check func() bool) {
	acts := rate.NewLimiter(rate.Every(putBackEvery), putBackBurst)
	var wait time.Duration // for the next check
	pending := time.After(settleDelay)
	for {
		select {
		case e, ok := <-x.w.Events:
			if !ok {
				return
			}
			if pending == nil && e.Name == path {
				pending = time.After(max(wait, settleDelay))
			}
		case <-x.w.Errors: // as when events were too many
			if pending == nil {
				pending = time.After(max(wait, settleDelay))
			}
		case <-pending:
			pending = nil
			// The directory knows nothing of a file that is mounted there.
			_ = x.w.Add(path)
			if wait = 0; check() {
				wait = acts.Reserve().Delay()
			}
		case <-x.stop:
			return
		}
	}
}

// close returns when check is not called any more. A nil watcher is closed.
func (x *watcher) close() {
	if x == nil {
		return
	}
	close(x.stop)
	x.done.Wait()
	_ = x.w.Close()
}
