package hostdns

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/time/rate"
)

const (
	// settleDelay gives another program time to finish writing the file.
	settleDelay = 100 * time.Millisecond
	// restoreEvery and restoreBurst limit how often other programs' changes are
	// reverted.
	restoreEvery = 10 * time.Second
	restoreBurst = 5
)

// watcher calls a function after changes of a file.
type watcher struct {
	w    *fsnotify.Watcher
	done sync.WaitGroup
	stop chan struct{}
}

// watch calls check at the start and after each change of the file at path,
// which may be replaced, until the watcher is closed. check reports whether it
// restored the file; calls that follow are rate-limited.
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
	restores := rate.NewLimiter(rate.Every(restoreEvery), restoreBurst)
	var wait time.Duration // minimum delay of the next check
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
		case <-x.w.Errors: // for example, too many events
			if pending == nil {
				pending = time.After(max(wait, settleDelay))
			}
		case <-pending:
			pending = nil
			// Changes of a mounted file are not events of its directory.
			_ = x.w.Add(path)
			if wait = 0; check() {
				wait = restores.Reserve().Delay()
			}
		case <-x.stop:
			return
		}
	}
}

// close stops the watcher and waits for a running check. A nil watcher is
// closed.
func (x *watcher) close() {
	if x == nil {
		return
	}
	close(x.stop)
	x.done.Wait()
	_ = x.w.Close()
}
