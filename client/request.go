package client

import (
	"context"
	"fmt"
	"net/http"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/connectip"
)

// maxInterim limits the responses to a request. All but the last are
// informational (RFC 9110 section 15.2).
const maxInterim = 8

// identify adds the credentials to the header of a request.
func (d *dialer) identify(h http.Header) {
	h.Set("User-Agent", userAgent)
	if d.token != "" {
		h.Set("Authorization", "Bearer "+d.token)
	}
}

// dial connects to the proxy and returns the stream of the accepted request.
func (c *Client) dial(ctx context.Context) (d *dialed, str *http3.RequestStream, err error) {
	d, err = c.dialer.connectAndRequest(ctx,
		func(ctx context.Context, h3 *http3.ClientConn) (err error) {
			str, err = c.request(ctx, h3)
			return err
		})
	return d, str, err
}

// request sends the Extended CONNECT request for the tunnel and checks the
// response (RFC 9484 section 4).
func (c *Client) request(ctx context.Context, h3 *http3.ClientConn) (*http3.RequestStream, error) {
	template, err := c.dialer.template()
	if err != nil {
		return nil, usage("proxy", "%v", err)
	}
	u, err := template.Expand(c.target.scope)
	if err != nil {
		return nil, usage("proxy", "%v", err)
	}
	req := (&http.Request{
		Method: http.MethodConnect,
		Proto:  connectip.Protocol,
		URL:    u,
		Host:   u.Host,
		Header: http.Header{
			http3.CapsuleProtocolHeader: {"?1"},
			connectip.InstanceHeader:    {c.instance},
		},
	}).WithContext(ctx)
	if c.cfg.Installation != "" {
		req.Header.Set(connectip.InstallationHeader, c.cfg.Installation)
	}
	c.dialer.identify(req.Header)
	if c.target.isPeer() {
		c.target.pair.SetFields(req.Header)
	}
	str, err := h3.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	if err := str.SendRequestHeader(req); err != nil {
		return nil, err
	}
	rsp, err := readFinalResponse(str)
	if err != nil {
		return nil, err
	}
	if c.target.isPeer() {
		return str, c.target.checkPeerResponse(rsp)
	}
	return str, checkResponse(rsp)
}

// checkPeerResponse is checkResponse for a request for a pair.
func (to *target) checkPeerResponse(rsp *http.Response) error {
	switch rsp.StatusCode {
	case http.StatusUnauthorized:
		return fail(causeCredentials, nil,
			fmt.Sprintf("the peer %s does not accept our identity", to.pair.To),
			fmt.Sprintf("it has to have [[peer]] domain = %q, and a certificate that proves %s",
				to.pair.From,
				to.pair.From))
	case http.StatusForbidden:
		return fail(causeForbidden, nil,
			fmt.Sprintf("the peer %s does not link with %s", to.pair.To, to.pair.From),
			"compare [[peer]] at its end with [federation] here")
	case http.StatusMisdirectedRequest:
		return fail(causeAnswer, nil,
			fmt.Sprintf("the server %s does not serve %s", to.host, to.pair.To),
			"compare federation.peer with federation.domains of the server")
	}
	return checkResponse(rsp)
}

// readFinalResponse returns the first response that is not informational.
func readFinalResponse(str *http3.RequestStream) (*http.Response, error) {
	for range maxInterim {
		rsp, err := str.ReadResponse()
		if err != nil {
			return nil, err
		}
		// HTTP/3 has no 101 (RFC 9114 section 4.5).
		if rsp.StatusCode >= 200 || rsp.StatusCode == http.StatusSwitchingProtocols {
			return rsp, nil
		}
	}
	return nil, fmt.Errorf("the proxy sent more than %d answers and no final one", maxInterim-1)
}

// checkResponse returns nil for a successful response (RFC 9484 section 4.5)
// that is well-formed (RFC 9297 section 3.2).
func checkResponse(rsp *http.Response) error {
	status := rsp.StatusCode
	kind, rcode := proxyError(rsp.Header)
	detail := proxyDetail(rsp.Header)
	switch {
	case status == http.StatusNoContent || status == http.StatusResetContent ||
		status == http.StatusPartialContent:
		return fmt.Errorf("the proxy's answer %d is not one to a request for a tunnel", status)
	case status >= 200 && status < 300:
		for _, field := range []string{"Content-Length", "Content-Type"} {
			if _, ok := rsp.Header[field]; ok {
				return fmt.Errorf("the proxy's answer %d has a %s, which a tunnel cannot have",
					status, field)
			}
		}
		return nil
	case status == http.StatusUnauthorized || status == http.StatusProxyAuthRequired:
		return fail(causeCredentials, nil, "the proxy does not accept the credentials",
			"ask its operator for a new invitation")
	case status == http.StatusForbidden:
		return fail(causeForbidden, nil, "the proxy does not allow this request"+detail,
			"check [scope], or ask its operator")
	case status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable:
		return fail(causeBusy, nil,
			fmt.Sprintf("the proxy takes no more sessions now, status %d%s", status, detail), "")
	case kind == "dns_error" && rcode == "NXDOMAIN":
		return fail(causeTarget, nil, "the proxy finds no address of the target's name",
			"check its spelling")
	case kind == "dns_error" || kind == "dns_timeout":
		return fail(causeBusy, nil, "the proxy cannot resolve the target's name now"+detail,
			"ask its operator to check its DNS")
	case status >= 500 || status == http.StatusRequestTimeout:
		// 408 means that the proxy waited in vain for the client's SETTINGS.
		return fail(causeBusy, nil,
			fmt.Sprintf("the proxy failed, status %d%s", status, detail), "")
	default:
		return fail(causeAnswer, nil,
			fmt.Sprintf("the proxy answered with status %d%s", status, detail),
			"check the URI template in proxy")
	}
}

// proxyDetail returns the field Proxy-Status in parentheses, with a leading
// space. It returns "" if there is none.
func proxyDetail(h http.Header) string {
	if s := h.Get("Proxy-Status"); s != "" {
		return fmt.Sprintf(" (%.200q)", s)
	}
	return ""
}

// proxyError returns the error type in Proxy-Status and the DNS response code
// (RFC 9209 section 2.3). Each is "" if it is missing.
func proxyError(h http.Header) (kind, rcode string) {
	list, err := httpsfv.UnmarshalList(h["Proxy-Status"])
	if err != nil {
		return "", ""
	}
	for _, member := range list {
		item, ok := member.(httpsfv.Item)
		if !ok {
			continue
		}
		v, _ := item.Params.Get("error")
		if token, ok := v.(httpsfv.Token); ok {
			kind = string(token)
			v, _ = item.Params.Get("rcode")
			rcode, _ = v.(string)
		}
	}
	return kind, rcode
}
