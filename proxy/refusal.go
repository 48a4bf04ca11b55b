package proxy

import (
	"fmt"
	"net/http"

	"github.com/dunglas/httpsfv"
)

// refusal is a response other than 2xx. The client sees status and the fields
// of Proxy-Status (RFC 9209); reason goes to the log.
type refusal struct {
	status int

	// proxyStatus is the error type of Proxy-Status. Empty means no
	// Proxy-Status.
	proxyStatus string

	rcode   string // parameter of dns_error; may be empty
	details string // parameter of Proxy-Status; may be empty

	reason error
}

func refuse(status int, proxyStatus, format string, args ...any) *refusal {
	return &refusal{status: status, proxyStatus: proxyStatus, reason: fmt.Errorf(format, args...)}
}

// counterKey returns the key under which r is counted: the error type that the
// client sees, or a word for the status.
func (r *refusal) counterKey() string {
	if r.proxyStatus != "" {
		return r.proxyStatus
	}
	switch r.status {
	case http.StatusUnauthorized:
		return "credentials"
	case http.StatusNotFound:
		return "not_served"
	case http.StatusRequestTimeout:
		return "no_settings"
	case http.StatusNotImplemented:
		return "unknown_protocol"
	}
	return "other"
}

// headerValue returns the value of Proxy-Status from the proxy with the given
// name, or "" if the response has none.
func (r *refusal) headerValue(name string) string {
	if r.proxyStatus == "" {
		return ""
	}
	item := httpsfv.NewItem(name)
	item.Params.Add("error", httpsfv.Token(r.proxyStatus))
	if r.rcode != "" {
		item.Params.Add("rcode", r.rcode)
	}
	if r.details != "" {
		item.Params.Add("details", r.details)
	}
	s, err := httpsfv.Marshal(httpsfv.List{item})
	if err != nil {
		return "" // the name cannot be written in a header field
	}
	return s
}
