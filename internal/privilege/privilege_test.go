package privilege

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestKeepSecrets(t *testing.T) {
	before, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	KeepSecrets()
	now, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if now != 0 || err != nil {
		t.Errorf("this process can be dumped: %d, %v", now, err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(before), 0, 0, 0); err != nil {
		t.Error(err)
	}
}
