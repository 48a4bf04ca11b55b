// Package rescue turns panics into errors. A panic in a goroutine that serves
// one peer then ends only this peer's session and not the program, which serves
// other peers.
//
// Locks that the goroutine held must be released by defer. The program counts
// panics with [Caught] and should log the stack in [Error].
package rescue

import (
	"fmt"
	"runtime/debug"
	"sync/atomic"
)

// Error describes a panic.
type Error struct {
	Value any    // argument of panic
	Stack []byte // the goroutine's stack from debug.Stack
}

// Error returns the value of the panic as text.
func (e *Error) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// caught is the number of panics that Catch recovered.
var caught atomic.Uint64

// Caught returns the number of panics that this process recovered.
func Caught() uint64 { return caught.Load() }

// Catch recovers a panic and calls end with it. If there is no panic, it does
// nothing. Catch must be called by defer directly. Functions that are deferred
// after Catch run before it, so none of them may wait for the effect of end.
//
//	defer rescue.Catch(ss.panicked)
func Catch(end func(*Error)) {
	if v := recover(); v != nil {
		caught.Add(1)
		end(&Error{Value: v, Stack: debug.Stack()})
	}
}

// Run calls f and returns an *[Error] if f panics.
func Run(f func()) (err error) {
	defer Catch(func(e *Error) { err = e })
	f()
	return nil
}
