"""How the frames of web pages and the heads of generated files read, for clean.py.

All patterns are of RE2, which Arrow runs over many lines at once. Most look at how a line begins
and say nothing of its rest, so that nearly every line of a text is done with after a few
characters.
"""

# What is left of a page's frame. A short line goes if it begins like this,
_NAVIGATION = (
    r"home|about(?: us)?|contacts?(?: us)?|log ?in|sign (?:in|up)|register|search|menu|site ?map"
    r"|privacy(?: policy)?|terms(?: (?:of (?:use|service)|(?:and|&) conditions))?|faqs?|help"
    r"|subscribe|newsletter|rss|blog|news|products|services|careers|disclaimer|cookies?"
    r"|cookie policy|my account|cart|checkout|gallery|shop|store|portfolio|testimonials"
    r"|(?:网站)?首页|加入收藏|收藏本站|设为首页|联系我们|关于我们|网站地图|友情链接|帮助(?:中心)?|意见反馈|广告服务"
    r"|法律声明|隐私(?:政策|条款|声明)|用户协议|服务条款|登录|登陆|(?:免费)?注册|立即登录|会员登录|退出|搜索|公司简介"
    r"|产品(?:中心|展示)|新闻(?:中心|动态)|在线留言|人才招聘|招贤纳士|客服中心|企业文化|荣誉资质|成功案例"
)
_STARTS = (
    # cookies and scripts
    r"(?:please )?(?:enable|turn on|activate) (?:java ?script|cookies)\b",
    r"you (?:need to|must|have to) (?:enable|have) java ?script",
    r"we (?:also )?use cookies\b",
    r"(?:this|our) (?:web)?site uses? cookies\b",
    r"(?:accept|reject|decline|manage|allow)(?: all)? cookies\b",
    # copyright
    r"(?:copyright )?(?:©|\(c\)|&copy;) ?(?:copyright )?(?:19|20)\d\d",
    r"copyright (?:19|20)\d\d",
    r"(?:proudly )?powered by (?:wordpress|blogger|drupal|joomla|shopify|discuz|vbulletin|phpbb)",
    # what to do with a page
    r"skip to (?:main |the )?(?:content|navigation)$",
    r"(?:back|return) to (?:the )?(?:top|home(?:page)?)$",
    r"(?:click|tap) here(?:$| to | for )",
    r"(?:continue reading|read more|read the full (?:story|article))\b",
    r"(?:show|load|view|see) more(?: \w+)?$",
    r"(?:share|tweet|pin|email|print) (?:this(?: \w+)?|on (?:facebook|twitter)|it|via \w+)$",
    r"(?:previous|next|older|newer) (?:posts?|articles?|entry|entries|story|stories)(?:$|[ :>»→])",
    r"leave a (?:reply|comment)\b",
    r"post navigation$",
    r"your email address will not be published",
    r"required fields are marked",
    r"notify me (?:of|when) (?:new|follow)",
    r"(?:follow|like|find) us on \w+",
    r"(?:sign up|subscribe) (?:for|to) (?:our|the) .*(?:newsletter|mailing list|updates|feed)",
    r"(?:add to (?:cart|basket|wishlist|bag)|(?:view|your|shopping) (?:cart|basket))\b",
    r"you (?:must|have to|need to) (?:be logged|log) in to\b",
    r"log in to (?:reply|comment|post|leave)\b",
    r"this entry was posted\b",
    r"you can (?:follow any responses|leave a response|skip to the end)\b",
    r"(?:filed under|posted in|tagged with)\b",
    # the same in Chinese
    r"(?:上一|下一)[篇页章条](?:$|\s|[:：|｜/])",
    r"(?:您|你)?的?(?:当前|现在|所在)的?位置(?:是|为)?\s*[:：]",
    r"(?:您|你)(?:现在|当前)?的?(?:所在)?位置\s*[:：]",
    r"(?:网站)?首页\s*(?:[>»›→/|｜]|--)",
    r"(?:点击|戳)(?:这里|此处)?(?:进入|查看|阅读|下载|浏览)(?:更多|全文|原文|详情|大图|专题|下一页)",
    r"(?:阅读|查看|展开|显示|浏览)(?:全文|原文|更多|剩余)",
    r"(?:返回|回到)(?:网站)?(?:首页|顶部|列表|上页|上一页|上一级)(?:$|[\s>»\]】])",
    r"(?:分享|转发)(?:到|至|给)",
    r"(?:微信)?(?:扫一扫|长按|扫描|识别).*(?:二维码|关注|下载)",
    r"(?:欢迎|请|敬请)?(?:关注|订阅)(?:我们|本站|官方)?的?.*(?:微信|公众号|微博|官微)",
    r"责任编辑\s*[:：]",
    r"(?:发布时间|发布日期|更新时间|浏览次数|浏览量|阅读次数|阅读量|点击次数|点击率|点击数|人气|字体|字号)\s*[:：]",
    r"免责声明\s*[:：]",
    r"本(?:站|网|网站).*(?:转载|侵权|不代表|立场)",
    r"(?:转载|转发)(?:时|本文)?请?(?:务必)?(?:注明|保留)(?:出处|来源|原文)",
    r"(?:未经|非经).*(?:许可|授权|允许|同意).*(?:转载|复制|使用|镜像)",
    r"(?:相关|热门|推荐|最新|随机)(?:阅读|新闻|文章|推荐|链接|资讯|评论|标签)\s*[:：]?$",
    r"(?:猜你喜欢|网友评论|发表评论)\s*[:：]?$",
    r"请?(?:先)?(?:启用|开启|打开)\s*JavaScript",
    # two items of navigation at least, and nothing else
    rf"(?:{_NAVIGATION})(?:[\s|｜·•>»/,，-]+(?:{_NAVIGATION}))+$",
)
# or if it has this anywhere.
_ANYWHERE = (
    r"\b(?:java ?script|cookies) (?:is|are|must be|needs? to be|appears? to be) (?:currently )?"
    r"(?:disabled|enabled|required|turned off)",
    r"your browser (?:does not|doesn't) support",
    r"by (?:continuing|using|browsing).*\b(?:use of cookies|privacy policy|terms of use)",
    r"\ball rights reserved\b",
    r"版权所有(?:$|[^者人权的了])",
    r"(?:ICP[备证]|公网安备)\s*\d",
    r"浏览器(?:不支持|版本过低|版本太低)",
)
LINE = rf"(?i)^[\s|·•»«›‹<>\[【(（]*(?:{'|'.join(_STARTS)})|{'|'.join(_ANYWHERE)}"
LONGEST_LINE = 120  # visible characters

GENERATED = (
    r"(?i)auto-?generated|automatically generated|@generated\b|\bcode generated\b"
    r"|generated (?:by|from|with|using)[^\n]*\n?[^\n]*do not (?:edit|modify)"
    r"|do not (?:edit|modify) (?:this file|manually|by hand)"
)
HEAD = 1_000  # characters, where a generator says so
