package fault

import (
	"errors"
	"os"
	"syscall"
)

// ListenError explains why the program cannot listen on addr, the value of a
// configuration key. protocol is TCP or UDP.
func ListenError(key, protocol, addr string, err error) *Error {
	e := &Error{Kind: Failure, Key: key, Remedy: "change " + key, Err: err}
	switch address := protocol + " " + addr; {
	case errors.Is(err, syscall.EADDRINUSE):
		tool := "ss -tlpn"
		if protocol == "UDP" {
			tool = "ss -ulpn"
		}
		e.Reason, e.Remedy = address+" is in use", "stop what uses it ("+tool+"), or change "+key
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		e.Reason = address + " is not an address of this host"
	case errors.Is(err, os.ErrPermission):
		e.Kind, e.Reason = Privileges, address+": "+err.Error()
		e.Remedy = "run with sudo or the capability CAP_NET_BIND_SERVICE, or choose a port above 1023"
	default:
		e.Reason = address + ": " + err.Error()
	}
	return e
}
