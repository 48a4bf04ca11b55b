package lab

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread calls f on an operating system thread of its own. The thread ends
// when f returns, so f may leave it in any namespace. It is never the main
// thread, which cannot end and whose namespaces /proc/self shows.
func onThread(f func()) {
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onThread(f) // chooses another thread, as this one is taken
			close(started)
			runtime.UnlockOSThread()
			return
		}
		close(started)
		f()
	}()
	<-started
}

// errGoexit is the error of a function that ended its goroutine.
var errGoexit = errors.New("lab: the function ended its goroutine")

// call calls f on a thread of its own and waits for it.
func call(f func() error) error {
	err := errGoexit
	done := make(chan struct{})
	onThread(func() {
		defer close(done)
		err = f()
	})
	<-done
	return err
}
