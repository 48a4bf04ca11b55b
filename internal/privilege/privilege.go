// Package privilege looks up and gives up privileges of this process.
package privilege

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"masquevpn/internal/fault"
)

// KeepSecrets keeps the memory of this process, with its keys and tokens, out
// of core files and from other processes of its user.
func KeepSecrets() {
	// It cannot fail with these arguments (prctl(2)).
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// RequireNetAdmin returns a *fault.Error if this process may not change the
// network of the host. capabilities are the ones that setcap(8) must give to
// the program so that it runs without sudo.
func RequireNetAdmin(capabilities string) error {
	ok, err := HasNetAdmin()
	if err != nil {
		return fmt.Errorf("looking up the privileges of this process: %w", err)
	}
	if !ok {
		return &fault.Error{Kind: fault.Privileges,
			Reason: "the capability CAP_NET_ADMIN is missing", Remedy: Remedy(capabilities)}
	}
	return nil
}

// Remedy returns two ways to give this program capabilities.
func Remedy(capabilities string) string {
	path, err := os.Executable()
	if err != nil {
		path = os.Args[0]
	}
	return fmt.Sprintf("run it with sudo, or once: sudo setcap %s+ep %s", capabilities, path)
}

// HasNetAdmin reports whether CAP_NET_ADMIN is effective in this thread. All
// threads of a Go process have the same capabilities.
func HasNetAdmin() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, err
	}
	const capability = unix.CAP_NET_ADMIN
	return data[capability/32].Effective&(1<<(capability%32)) != 0, nil
}
