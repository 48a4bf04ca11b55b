package cli

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// KeepSecrets keeps what this process knows, keys and tokens, out of core files
// and from other processes of its user.
func KeepSecrets() {
	// It cannot fail with these arguments (prctl(2)).
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// RequireNetAdmin tells what to do when this process may not change the
// network of the host. The capabilities are what setcap(8) has to give to the
// program for it to run without sudo.
func RequireNetAdmin(capabilities string) error {
	ok, err := hasCapability(unix.CAP_NET_ADMIN)
	if err != nil {
		return fmt.Errorf("looking up the privileges of this process: %w", err)
	}
	if !ok {
		return &Error{Code: Privileges, Reason: "the capability CAP_NET_ADMIN is missing",
			Remedy: netAdminRemedy(capabilities)}
	}
	return nil
}

func netAdminRemedy(capabilities string) string {
	path, err := os.Executable()
	if err != nil {
		path = os.Args[0]
	}
	return fmt.Sprintf("run it with sudo, or once: sudo setcap %s+ep %s", capabilities, path)
}

// hasCapability tells whether the capability is effective in this thread. All
// threads of a Go process have the same.
func hasCapability(capability uint) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, err
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0, nil
}
