package rescue

import (
	"errors"
	"strings"
	"sync"
	"testing"
)

func TestRun(t *testing.T) {
	before := Caught()
	if err := Run(func() {}); err != nil {
		t.Errorf("got %v without a panic", err)
	}
	err := Run(func() { panicking() })
	var e *Error
	if !errors.As(err, &e) || e.Value != "on purpose" {
		t.Fatalf("got %v, want the panic", err)
	}
	if !strings.Contains(string(e.Stack), "panicking") {
		t.Errorf("the stack does not name the function that panicked:\n%s", e.Stack)
	}
	if got := Caught() - before; got != 1 {
		t.Errorf("Caught counted %d panics, want 1", got)
	}
}

func panicking() { panic("on purpose") }

// TestCatchFreesLocks checks that deferred functions release locks before Catch
// calls end.
func TestCatchFreesLocks(t *testing.T) {
	var mu sync.Mutex
	ended := 0
	func() {
		defer Catch(func(*Error) { ended++ })
		mu.Lock()
		defer mu.Unlock()
		panicking()
	}()
	if ended != 1 || !mu.TryLock() {
		t.Errorf("end was called %d times, want 1, or the lock is still held", ended)
	}
}
