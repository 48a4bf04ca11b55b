// Package rescue turns a panic of one goroutine into an error, so that it ends what the goroutine serves, and not the program with
// all that it serves besides.
package rescue

import (
	"fmt"
	"runtime/debug"
	"sync/atomic"
)

// Error is a panic.
type Error struct {
	Value any    // of the panic
	Stack []byte // of the goroutine, as debug.Stack prints it
}

func (e *Error) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

var caught atomic.Uint64

// Caught returns how many panics have become errors in this process.
func Caught() uint64 { return caught.Load() }

// Catch calls end with a panic, if there is one. It has to be deferred itself, behind nothing that waits for the same goroutine:
//
//	defer rescue.Catch(ss.panicked)
func Catch(end func(*Error)) {
	if v := recover(); v != nil {
		caught.Add(1)
		end(&Error{Value: v, Stack: debug.Stack()})
	}
}

// Run calls f, and returns a panic of f as an error.
func Run(f func()) (err error) {
	defer Catch(func(e *Error) { err = e })
	f()
	return nil
}
